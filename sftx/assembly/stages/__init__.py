"""Stages: what plugins made, each wrapped once in a class that names the plugin in errors and checks what it returns.

A wrapper refuses results that would train or evaluate wrongly without a sign, where the plugin's name is known; nothing
after it checks them again. Importing these modules imports no torch.
"""
