"""Words: what a format, a rule, a plan is. No torch, no numpy."""
