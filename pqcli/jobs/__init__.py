"""The verbs: plan, compress, decode, report, verify; and where their work runs."""
