using System.Runtime.ExceptionServices;

namespace Vmm.Core.SaveVm;

/// <summary>Makes every one of several calls, even when one of them fails.</summary>
internal static class Each
{
    /// <summary>Makes all calls, then throws the first exception that one of them threw.</summary>
    internal static void Call<T>(IEnumerable<T> items, Action<T> call)
    {
        Exception? first = null;
        foreach (T item in items)
        {
            try
            {
                call(item);
            }
#pragma warning disable CA1031 // Thrown again below, after the remaining calls.
            catch (Exception e)
#pragma warning restore CA1031
            {
                first ??= e;
            }
        }
        if (first is not null) ExceptionDispatchInfo.Throw(first);
    }
}
