namespace Vmm.Tests.Support;

/// <summary>What a call throws, whatever its type: NUnit 5's untyped <c>Assert.Catch</c> takes exactly <see cref="Exception"/>.</summary>
internal static class Caught
{
    /// <summary>Makes the call.</summary>
    /// <returns>The exception, or null when there was none; the caller asserts its type.</returns>
    internal static Exception? By(Action call)
    {
        try
        {
            call();
            return null;
        }
#pragma warning disable CA1031 // The caller judges it.
        catch (Exception e)
#pragma warning restore CA1031
        {
            return e;
        }
    }
}
