"""Studies of families' weights beside the server: what is to be studied, by whom, what came of it.

Knows no tensor and no route; a process of its own reads the weights.
"""
