"""Local training: clients train the whole network on their own data, and models are averaged."""
