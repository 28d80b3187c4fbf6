"""Bits per byte, exact-match tasks, preference win rate, intervals, attention maps."""
