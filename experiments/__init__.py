"""One YAML file per experiment, and in NAME/ what goes on top of NAME.yaml."""
