"""Settings of the stage `evaluate`."""

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import ClassVar

from hf_scratch_gpt.runs import StageArguments


@dataclasses.dataclass
class EvaluateArguments(StageArguments):
    """Settings of the stage `evaluate`.

    Args:
        model_names (`list[str]`): What to call each of `models` in the report.
        models (`list[str]`): Folders (or Hub ids) of the models, in the order of the road.
        reference (`str`, *optional*, defaults to `"sft"`): Name of the model that others are compared with.
        dataset_dir (`str`): Folder of the stage `prepare`, with held-out documents and tasks.
        questions_source (`str`, *optional*): Own questions instead of the tasks: a file or data set id.
        examples_source (`str`, *optional*): Own training rows for few-shot examples, likewise.
        reward_model (`str`, *optional*): Folder of a reward model, to be measured on held-out pairs.
        questions (`int`, *optional*, defaults to `200`): Most questions asked; 0 asks all.
        pairs (`int`, *optional*, defaults to `400`): Most held-out preference pairs; 0 takes all.
        samples_per_prompt (`int`, *optional*, defaults to `4`): Sampled answers a question; 0 samples none.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature of the sampled answers.
        max_new_tokens (`int`, *optional*, defaults to `48`): Longest answer.
        few_shot (`int`, *optional*, defaults to `3`): Solved examples in a few-shot prompt; 0 leaves few-shot out.
        few_shot_models (`list[str]`, *optional*, defaults to the first model and the reference): Asked few-shot.
        text_bytes (`int`, *optional*, defaults to `100000`): Most bytes of held-out text; 0 takes all.
        batch_size (`int`, *optional*, defaults to `64`): Answers generated at once.
        attention_text (`str`, *optional*): Sentence of the attention map.
    """

    input_fields: ClassVar[tuple[str, ...]] = (
        "models",
        "dataset_dir",
        "reward_model",
        "questions_source",
        "examples_source",
    )

    model_names: list[str] = field(default_factory=list, metadata={"help": "Name of each of the models."})
    models: list[str] = field(default_factory=list, metadata={"help": "Folders of the models."})
    reference: str = field(default="sft", metadata={"help": "Name of the model that others are compared with."})
    dataset_dir: str = field(default="", metadata={"help": "Folder of the stage 'prepare'."})
    questions_source: str = field(default="", metadata={"help": "Own questions: a file or data set id."})
    examples_source: str = field(default="", metadata={"help": "Own rows for few-shot examples: a file or id."})
    reward_model: str = field(default="", metadata={"help": "Folder of a reward model to be measured."})
    questions: int = field(default=200, metadata={"help": "Most questions asked; 0 asks all."})
    pairs: int = field(default=400, metadata={"help": "Most held-out preference pairs; 0 takes all."})
    samples_per_prompt: int = field(default=4, metadata={"help": "Sampled answers a question; 0 samples none."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampled answers."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest answer in tokens."})
    few_shot: int = field(default=3, metadata={"help": "Solved examples in a few-shot prompt; 0 for none."})
    few_shot_models: list[str] = field(
        default_factory=list, metadata={"help": "Models asked few-shot (default: the first and the reference)."}
    )
    text_bytes: int = field(default=100_000, metadata={"help": "Most bytes of held-out text; 0 takes all."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at once."})
    attention_text: str = field(
        default="The sorted() function returns a new sorted list from the items in an iterable.",
        metadata={"help": "Sentence of the attention map."},
    )

    def __post_init__(self) -> None:
        if not self.models or len(self.models) != len(self.model_names):
            raise ValueError(
                f"'models' and 'model_names' go together: found {len(self.models)} and {len(self.model_names)}"
            )
        if len(set(self.model_names)) != len(self.model_names):
            raise ValueError(f"'model_names': each name may occur once, found {', '.join(self.model_names)}")
        for name in self.model_names:
            if not name or Path(name).name != name:
                raise ValueError(f"'model_names': '{name}' must be a plain word, since a file is named after it")
        for name in self.few_shot_models:
            if name not in self.model_names:
                raise ValueError(f"'few_shot_models': no model is called '{name}' ({', '.join(self.model_names)})")
        if len(self.models) > 1 and self.reference not in self.model_names:
            raise ValueError(f"'reference': no model is called '{self.reference}' ({', '.join(self.model_names)})")
        if not self.dataset_dir and not self.questions_source:
            raise ValueError("'dataset_dir' is missing: name the folder of the stage 'prepare'")
        if self.samples_per_prompt > 0 and not self.temperature > 0:
            raise ValueError(f"'temperature' is {self.temperature}: sampled answers need one above 0")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("'max_new_tokens' and 'batch_size' must be at least 1")
