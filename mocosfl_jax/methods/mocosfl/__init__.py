"""MocoSFL (Li et al., ICLR 2023): a client side, a server side, messages, and the step of both."""
