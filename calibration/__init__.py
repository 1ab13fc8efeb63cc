"""Short real engine runs on the user's GPUs that become run records; the only code that needs a GPU.

The runners import nothing but the standard library and the engine itself, so they work on a bare GPU host.
"""
