"""This package turns the plugin names of a configuration into the stages of a run.

`hookspecs` declares the hooks, `discovery` finds and imports plugins, `registry` activates the plugins of a run and
calls their hooks, `stages` wraps what the plugins made, so that an error names its plugin and a wrong result is refused
where it arises. It imports `sftx.config`, `sftx.distributed.process_group` and the modules directly under `sftx`;
`hookspecs` imports only `sftx.types` and `sftx.events`.
"""
