"""What connects a model with the rest of the world: `doctor` checks a model as its users' tools would use it."""
