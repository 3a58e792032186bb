"""From policy, model and format to a plan, and what can be asked of plans."""
