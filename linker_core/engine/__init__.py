"""One batch across variants: routing, attention, scheduling, sampling."""
