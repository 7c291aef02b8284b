"""A worker that computes nothing, speaks the real protocol and misbehaves as it is told."""
