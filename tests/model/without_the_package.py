# ruff: noqa: E402, PT017 (the package is hidden before anything is imported; a script is no pytest)
"""Load saved models by `trust_remote_code` where this package is not installed: test_model_loading.py runs this.

`python -I without_the_package.py FOLDER` writes what each model in the folder computes, and checks what only this
process can see. It imports nothing but transformers, torch and safetensors.
"""

import sys
from pathlib import Path


class Absent:
    """An import hook under which the package cannot be found, though it may be installed beside this interpreter."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_scratch_gpt":
            raise ModuleNotFoundError("No module named 'hf_scratch_gpt'", name="hf_scratch_gpt")


sys.meta_path.insert(0, Absent())
import torch
import transformers
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")["input_ids"]
outputs = {}
for path in sorted(folder.glob("*/Auto*")):
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    model = getattr(transformers, path.name).from_pretrained(path, trust_remote_code=True).eval()
    assert type(model).__name__ in model.config.auto_map[path.name]
    made = type(model)(model.config)  # what `from_pretrained` leaves out of the file must be as when built
    for name, buffer in made.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    with torch.no_grad():
        outputs[f"{path.parent.name}/{path.name}"] = model(inputs)[0].contiguous()
    if path.name == "AutoModelForCausalLM":
        greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        written = model.generate(inputs, use_cache=True, **greedy)  # a cache that is not understood leaves one token
        assert torch.equal(written, model.generate(inputs, use_cache=False, **greedy)), path
        if path.parent.name == "gpt2":
            model.save_pretrained(folder / "saved-again")
try:
    type(config).from_preset("modern-5m")
except ImportError as error:
    assert "pip install hf_scratch_gpt" in str(error)
else:
    raise AssertionError("the package was found after all")
fill = transformers.pipeline("fill-mask", model=str(folder / "masked"), trust_remote_code=True)
assert type(fill.model).__name__ == "ScratchGPTForMaskedLM"
assert not fill.model.config.is_causal
outputs["fill-mask"] = fill.model(**fill.tokenizer("The user <|mask|> and", return_tensors="pt")).logits.detach()
assert fill("The user <|mask|> and")[0]["token"] == outputs["fill-mask"][0].softmax(-1)[-2].argmax().item()
save_file(outputs, folder / "outputs.safetensors")
tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
print(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"])
assert "hf_scratch_gpt" not in sys.modules
