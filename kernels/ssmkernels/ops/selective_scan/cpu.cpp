// The selective scan of real states, forward.
#include "selective_scan/cpu_forward.h"

SSMZOO_EXPORT(selective_scan)(const ssmzoo::ScanArguments* a) {
    using namespace ssmzoo::SSMZOO_ISA;
    return scan<Real>(*a);
}
