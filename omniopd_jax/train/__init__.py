"""Training: the mesh, the one jitted step, the loop, and what a work directory holds."""
