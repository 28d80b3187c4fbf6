"""The embedded instruction set: questions about the standard library with checkable answers, and pairs.

from hf_scratch_gpt.data.tasks import write_tasks, is_exact
write_tasks("runs/tasks")
"""

from hf_scratch_gpt.data.tasks.checker import chance_level, gold_reward, is_exact, report_prompts
from hf_scratch_gpt.data.tasks.rows import write_tasks

__all__ = ["chance_level", "gold_reward", "is_exact", "report_prompts", "write_tasks"]
