"""What each question of the study finetunes, and what comes out of it."""
