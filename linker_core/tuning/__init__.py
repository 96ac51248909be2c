"""Prices plans: what sharing costs a variant, measured before anyone is served by it."""
