"""The engine's arithmetic on CPUs: loops compiled for this machine when they are first needed.

Every row's result is the same, bit for bit, whatever else is in the batch: each kernel has one
order of summation, which depends on the row alone.
"""
