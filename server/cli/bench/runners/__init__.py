"""Engines without HTTP, each in a process of its own that answers rounds of streams.

`channel` is started with a runner's name, in the environment of the runner's engine: files here see
each other by their bare names and import nothing of this project, save `own`.
"""
