"""The ten-minute demo: two experts of SmolLM2-135M, merged uniformly and layer by layer."""
