"""The method as pure functions: arrays and keys in, arrays out."""
