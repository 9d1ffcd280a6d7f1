"""What all methods share: their contract with the loop, the state, the mesh."""
