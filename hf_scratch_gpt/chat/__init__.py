"""Conversation state and the terminal."""
