using System.Runtime.ExceptionServices;

namespace Vmm.Core.SaveVm;

/// <summary>Calls of which none may be left out because another failed.</summary>
internal static class Each
{
    /// <summary>Makes all calls, then throws what the first that failed threw.</summary>
    internal static void Call<T>(IEnumerable<T> items, Action<T> call)
    {
        Exception? first = null;
        foreach (T item in items)
        {
            try
            {
                call(item);
            }
#pragma warning disable CA1031 // Thrown again below, when the others have had their call.
            catch (Exception e)
#pragma warning restore CA1031
            {
                first ??= e;
            }
        }
        if (first is not null) ExceptionDispatchInfo.Throw(first);
    }
}
