"""Stand-ins for modules of transformers' tests that its source distribution leaves out."""
