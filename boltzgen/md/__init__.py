"""The door to OpenMM: loading, platforms, contexts, the target, and simulation."""
