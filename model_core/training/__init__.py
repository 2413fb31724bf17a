"""Training of diffusion models, upsamplers and noisy classifiers (paper, Sections 2 to 4): ``guided train``.

``config`` says what a run is and imports no torch; ``run`` puts it together; ``loop`` is the training
loop; ``diffusion`` and ``classifier`` are what it trains; ``publishing`` makes bundles of it.
"""
