using Vmm.Tests.House.Sample.Low;

namespace Vmm.Tests.House.Sample.High;

/// <summary>Uses each type of the folder Low in another way, so that a test can check <see cref="FolderArrows"/>. Nothing calls it.</summary>
[Low]
internal sealed class HighUser : LowBase, ILow
{
    internal LowField? Field { get; set; }

    internal List<LowElement[]>? Elements { get; set; }

    internal LowResult? Signature(LowArgument argument) => argument is null || Field is null ? null : default(LowResult);

    internal void Constrained<T>(T value) where T : ILowConstraint => _ = value;

    internal object? Body(object value)
    {
        var local = default(LowLocal);
        local.Value++;
        try
        {
            LowStatic.Call();
            LowStatic.CallGeneric<LowTypeArgument>();
            if (local.Value > 0) return new LowNew();
        }
        catch (LowException)
        {
            return null;
        }
        return value is LowCast ? (Func<object>)(static () => new LowInLambda()) : null;
    }

    internal async Task<object> BodyAsync()
    {
        await Task.Yield();
        return new LowInAsync();
    }
}
