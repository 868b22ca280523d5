"""The learner: ranks that train on claimed packs and on ground truth, and publish what they learn."""
