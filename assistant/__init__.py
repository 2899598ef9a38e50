"""People and the served policy: chat, feedback, release and the engines. Knows nothing of training."""
