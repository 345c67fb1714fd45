"""What users run beside training: `megarl prepare-data`, `megarl convert` and `megarl fetch-smollm2`."""
