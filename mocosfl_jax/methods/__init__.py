"""The methods: each a package with a recipe that names what it reads and how it is built."""
