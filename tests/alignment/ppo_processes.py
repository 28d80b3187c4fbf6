"""Runs PPO in groups of real processes over gloo, one group after the other, with the imports paid once.

    python tests/alignment/ppo_processes.py FOLDER [JOB ...]

Each process of each job writes what it ended with to `FOLDER/<job>.<rank>.json` and `.safetensors`.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "pretraining")]

OPTIONS = {
    "max_steps": 6,
    "rollout_batch_size": 16,
    "num_ppo_epochs": 2,
    "learning_rate": 2e-2,
    "optim": "sgd",
    "whiten_rewards": True,
    "kl_target": 0.5,
    "logging_steps": 2,
    "responses_per_prompt": 2,
    "max_new_tokens": 8,
}
KINDS = {
    "full-separate": {"critic": "separate"},
    "lora-shared": {"critic": "shared", "peft": True},
    "ptx": {"critic": "shared", "ptx": True},
}
SAVING = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}


def jobs_of(folder: Path) -> list[dict]:
    """The jobs, in order; a job resumes from the checkpoint of one before."""
    jobs = []
    for kind, options in KINDS.items():
        for processes in (1, 2):
            jobs.append({"name": f"{kind}-{processes}", "processes": processes, **options, "evaluates": True})
    for kind in ("full-separate", "lora-shared"):
        saved = {**KINDS[kind], **SAVING, "max_steps": 7, "processes": 2, "folder": f"saved-{kind}"}
        jobs.append({"name": f"whole-{kind}", **saved})
        # Step 3 is inside the first rollout, whose minibatches are of both processes' episodes.
        jobs.append({"name": f"resumed-{kind}", **saved, "resume": str(folder / f"saved-{kind}" / "checkpoint-3")})
    jobs.append({"name": "raising", "processes": 2, "critic": "shared", "raises": True})
    return jobs


def raises_on_the_second(prompts, completions, **columns):
    """A reward that fails in one process alone."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("no judge here")
    return [0.0] * len(prompts)


def run_job(job: dict, folder: Path, rank: int) -> None:
    """One process of a job."""
    from ppo_tiny import likes_low, make_reward_model, make_trainer
    from safetensors.torch import save_file

    job, name = dict(job), job["name"]
    processes, resume = job.pop("processes"), job.pop("resume", None)
    given = {"ptx_dataset": [f"w{n} w{n + 1} w{n + 2} w{n + 3}" for n in range(40)]} if job.pop("ptx", False) else {}
    reward = raises_on_the_second if job.pop("raises", False) else [make_reward_model(), likes_low]
    evaluates, output = job.pop("evaluates", False), folder / job.pop("folder", name)
    job.pop("name")
    options = {**OPTIONS, "per_device_train_batch_size": 8 // processes, "ptx_batch_size": 4 // processes, **job}
    trainer = make_trainer(output, reward=reward, given=given, **options)
    if evaluates:
        trainer.eval_prompts = trainer.prompts[:5]
    told: dict = {}
    rollouts = []
    roll_out = trainer._roll_out
    trainer._roll_out = lambda index: (roll_out(index), rollouts.append(trainer.rollout))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        told["error"] = str(error)
    if evaluates:
        told["evaluation"] = trainer.evaluate()
    told["rollouts"] = trainer.records.rollouts
    told["lines"] = [line for line in trainer.state.log_history if "loss" in line]
    told["steps"] = trainer.state.global_step
    told["processes"] = trainer.accelerator.num_processes
    told["tokens"] = trainer.state.num_input_tokens_seen
    tensors = {f"parameter.{n}": value.detach().clone() for n, value in trainer.model.named_parameters()}
    for number, rollout in enumerate(rollouts):
        tensors |= {f"rollout{number}.{n}": value.contiguous() for n, value in rollout.tensors().items()}
    save_file(tensors, folder / f"{name}.{rank}.safetensors")
    (folder / f"{name}.{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    """Run all jobs into the folder that the command line names."""
    import torch
    from ppo_tiny import make_trainer  # noqa: F401  imported before the forks
    from process_groups import environment_of, free_port

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    wanted = sys.argv[2:]  # names, to run only some
    for job in (job for job in jobs_of(folder) if not wanted or job["name"] in wanted):
        port, children = free_port(), []
        for rank in range(job["processes"]):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    os.environ.update(
                        environment_of("ddp", job["processes"], rank, port) if job["processes"] > 1 else {}
                    )
                    run_job(job, folder, rank)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(statuses):
            raise SystemExit(f"{job['name']}: {statuses}")


if __name__ == "__main__":
    main()
