"""Plugins that train on answers of the model: rollouts with their losses."""
