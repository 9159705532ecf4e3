"""From a rule to rows, and whether they are better than others."""
