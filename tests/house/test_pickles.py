"""Pickles from before the modules moved into folders still load, and new ones name no module but `optax_mpo`."""

import base64
import pickle
import pickletools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo

# Params and state after one step, pickled by the commit before the move.
OF_VERSION_0_1_0 = (
  b"c-obdU1-x#7>1Mn(9LQ0gDt{P3S-bpiKs(SWV05T7^%84bTSEP`jgJ)r^$&f&azI}X60PDvny}BQBbg;D0;bT@zUX?UhDO)>vz&+224>yo|A"
  b"-g@}Bp5zoZ%3Y=s!-Xb{ZaBRH;Fif(g)q!}env1+I)8ir^Syk9U%lBSx-up~q_2o5_d367}6?vf3{Gpi)a7RWl8AxWO)6RSiH<8Tq#dWpUgC"
  b"{K{qqwZ`Fv*$=Im%H47!x?x6kwPom?D}~z$uP+&@CCdCz5pE{cAjC50#m>&umCIrkAY3#8Sn~t4{QOSfNkJA@B`QZm<+>&fdOC$hykNO0vOK"
  b"_uwmkurXz7tP;`wGYMN;ZrX<!%1V^vHL!RE}k%(wnNjW4(Xz6nQZs93;xRs^3PE#$P=_n3VJyFObenEs-Q0O5r*41~Waol57(iFX<n&7NR@K"
  b"E;mlk2uYWcCk1r&D0cI_~Yy1K<867(7~+q95Nx=HEu<=Ys9IP@9gycKYF0dOG>ZX?$Qtv(#c$t+-qFsKYH2AN15ww?q|H@6#%x*WLU76XFEZ"
  b"kT_(Bs#(?y1>$hpcEQdRMdcr*Xj*vK<Ev29q&p_T{d=bTMBF^9o;>B#{%Q6N#t)CBj!m4I%ue%H^EYnY7K@dInpQ`5?WM-D?+3uMyZt)xw~r"
  b"{$=P0a^6=FKApY=C;idqQ|j2t>Lo<4atbLrYmp`tG~TTh-ofBj+W^Y*u&JDuKE%COP9rM->TVZei)CKN;yew}?66&=}b@~IWFM(A=E<XpL5R"
  b"g$Yo"
)


def make():
  compact = mpo.quantized_state(optax.adam(1e-2), min_size=1)
  tx = mpo.loss_scaled(mpo.compensated(compact, 8, rounding="stochastic"))
  return tx, *mpo.init(tx, {"w": jnp.arange(32, dtype=jnp.float32) / 3})


def test_a_state_that_was_pickled_before_the_move_trains_on():
  tx, params, state = make()
  weights, kept = pickle.loads(zlib.decompress(base64.b85decode(OF_VERSION_0_1_0)))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert jax.tree.structure(kept) == jax.tree.structure(state)
  params = jax.tree.map(lambda new, old: old.astype(new.dtype), params, weights)
  before = mpo.master_params(params, kept)["w"]
  np.testing.assert_allclose(before, np.arange(32) / 3 - 0.01 * (np.arange(32) > 0), atol=1e-4)  # one step of Adam
  grads = jax.tree.map(lambda p: (p * 2.0**15).astype(jnp.bfloat16), params)
  updates, kept = tx.update(grads, jax.tree.map(jnp.asarray, kept), params)
  assert int(kept.good_steps) == 2
  assert np.all(np.asarray(mpo.master_params(mpo.apply_updates(params, updates), kept)["w"])[1:] < before[1:])


CLASSES = [c for name, c in vars(mpo).items() if isinstance(c, type) and not name.startswith("_")]


@pytest.mark.parametrize("public", CLASSES, ids=lambda c: c.__name__)
def test_public_classes_belong_to_the_package(public):
  assert public.__module__ == "optax_mpo"


def test_a_pickle_of_now_names_no_module_that_may_move():
  data = pickle.dumps(jax.tree.map(np.asarray, make()[2]))
  texts = {arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str) and "optax_mpo" in arg}
  assert texts == {"optax_mpo"}
