"""What a client computes, holds and sends, from a config alone, before anything runs."""
