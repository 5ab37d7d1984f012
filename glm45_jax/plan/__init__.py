"""Plans: what programs cost on chips that are not there."""
