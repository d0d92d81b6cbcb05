# fiak_cuda_architectures(RESULT requested nvcc nvidia_smi): what CUDA kernels are compiled for, as CMake's property
# CUDA_ARCHITECTURES takes it. `requested`, the option FIAK_CUDA_ARCHS:
#
#   (empty)  the architectures of this machine's GPUs, as `nvidia_smi` names them; where there are none that the kernels
#            run on, sm_80 and PTX
#   all      every architecture that differs in its code, and PTX
#   a list   as it is, for example 80-real;90-real
#
# The PTX is that of sm_80, the oldest, since kernels use nothing newer: the driver compiles it for any other GPU from
# sm_80 on, also for those between the others (sm_110), which the newest one's PTX would leave out.
function(fiak_cuda_architectures RESULT requested nvcc nvidia_smi)
  if(requested STREQUAL "all")
    set(architectures 80-real 86-real 89-real 90-real 100-real 120-real 80-virtual)
  elseif(requested)
    set(architectures ${requested})
    foreach(architecture ${architectures})
      if(NOT architecture MATCHES "^([0-9]+)[af]?(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
        message(FATAL_ERROR "FIAK_CUDA_ARCHS must be empty, all, or architectures from 80 on (got ${requested})")
      endif()
    endforeach()
  else()
    set(capabilities "")
    if(nvidia_smi)
      execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
                      OUTPUT_VARIABLE listed RESULT_VARIABLE failed ERROR_QUIET)
      if(failed EQUAL 0)
        string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${listed}")
      endif()
    endif()
    execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known)
    string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
    set(architectures "")
    foreach(capability ${capabilities})
      string(REPLACE "." "" architecture ${capability})
      if(architecture LESS 80)
        message(STATUS "A GPU of compute capability ${capability} is left out: the kernels need 8.0")
      elseif("sm_${architecture}" IN_LIST known)
        list(APPEND architectures ${architecture}-real)
      else()
        list(APPEND architectures 80-virtual)  # newer than nvcc
      endif()
    endforeach()
    list(REMOVE_DUPLICATES architectures)
    if(NOT architectures)
      set(architectures 80-real 80-virtual)
    endif()
  endif()
  set(${RESULT} "${architectures}" PARENT_SCOPE)
endfunction()
