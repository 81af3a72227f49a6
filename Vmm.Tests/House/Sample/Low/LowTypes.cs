namespace Vmm.Tests.House.Sample.Low;

internal class LowBase;

internal interface ILow;

[AttributeUsage(AttributeTargets.All)]
internal sealed class LowAttribute : Attribute;

internal sealed class LowField;

internal sealed class LowArgument;

internal sealed class LowResult;

internal sealed class LowElement;

internal interface ILowConstraint;

internal struct LowLocal
{
    internal int Value;
}

internal sealed class LowException : Exception;

internal sealed class LowNew;

internal static class LowStatic
{
    internal static void Call()
    {
    }

    internal static void CallGeneric<T>()
    {
    }
}

internal sealed class LowTypeArgument;

internal sealed class LowCast;

internal sealed class LowInLambda;

internal sealed class LowInAsync;
