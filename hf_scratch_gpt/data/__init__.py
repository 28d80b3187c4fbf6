"""Sources, cleaning, tokenised shards, the loader, conversation formats, tasks with their checkers."""
