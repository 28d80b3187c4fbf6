"""Turns what a user can cause into one line that names the culprit."""

import errno

_FULL_DISK_TEXTS = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")


def is_full_disk(error: BaseException) -> bool:
    """Whether `error` comes from a full disk: libraries wrap ENOSPC in errors of their own that keep only its text."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(seen) for text in _FULL_DISK_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def explain(error: BaseException) -> str | None:
    """One line for a user's mistake or a full disk; `None` for a defect of ours, which deserves its traceback."""
    if is_full_disk(error):
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return f"the disk is full{where}; free some space and run the same command again: finished work is kept"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split()) or type(error).__name__
    return None
