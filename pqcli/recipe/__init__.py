"""What is wished: `Recipe` and `Rule`, from flags, YAML, presets, or fairseq's YAML."""
