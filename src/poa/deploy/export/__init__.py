"""Sub-networks in the formats of other libraries, each opened by its own runtime and compared with the family."""
