from cachemoe.kernels.route_cpu import route_cpu
from cachemoe.kernels.reference import *
from cachemoe.kernels.reference import SOFTMAX, NO_BIAS
def route(logits,state,evict,top_k,bias=NO_BIAS,scores=SOFTMAX,correction=None,out=None):
    if out is None: out=Routing.empty(logits.shape[0],logits.shape[1],top_k)
    route_cpu(logits,state,evict,top_k,bias,scores,correction,out)
    return out
