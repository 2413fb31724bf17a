"""The diffusion model itself: networks, process, samplers, guidance and bundles.

Nothing here knows about Redis or HTTP. Importing this package, ``model_core.config``,
``model_core.presets`` or ``model_core.schedule`` does not import torch, so the server and the
client can validate what a user asks for without it.
"""
