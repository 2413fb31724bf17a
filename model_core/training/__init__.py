"""Training of the diffusion model and of the noisy classifier (paper, Sections 2 to 4).

``config`` says what a run is and imports no torch; ``loop`` is the training loop; ``diffusion``
and ``classifier`` are the two things it trains. Run with ``python -m model_core.training``.
"""
