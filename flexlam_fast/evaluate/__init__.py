"""How well a trained FlexLAM acts and reconstructs: rollouts, tables, film strips, and the demo."""
