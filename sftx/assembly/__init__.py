"""This package turns the plugin names of a configuration into the stages of a run.

`hookspecs` declares the hooks, `discovery` finds and imports plugins, `registry` activates the plugins of a run and
calls their hooks, `stages` puts the plugin's name into its errors; `data_checks` and `training_checks` validate what
the stages return. It imports `sftx.config`, `sftx.distributed.process_group` and the modules directly under `sftx`;
`hookspecs` imports only `sftx.types` and `sftx.events`, so that `sftx.config` can import it.
"""
