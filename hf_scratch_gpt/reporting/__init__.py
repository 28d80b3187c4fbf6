"""Reads run folders and tells them: stage table, JSON and HTML report."""
